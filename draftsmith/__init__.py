"""draftsmith: train, prove, measure and publish drafters for speculative decoding.

The folders beside this one are its parts: `models` (what proposes and what verifies), `train` (recipe to drafter),
`eval` (decoding and measuring), `recipes` (YAML and the bundled reference models), `launch` (the command line).
"""

__version__ = "0.1.0"
