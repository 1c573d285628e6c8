"""Recipe to drafter: recipe -> rows -> features -> loss -> DeepSpeed step -> checkpoint -> drafter directory.

`python -m draftsmith.train RECIPE` and `deepspeed --module draftsmith.train RECIPE` are `draftsmith train RECIPE`.
"""
