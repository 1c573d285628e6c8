"""Recipes (YAML), the bundled reference targets and drafters, and prompts: data only."""
