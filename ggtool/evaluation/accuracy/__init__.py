"""Task accuracy by EleutherAI's lm-eval, for every format: its tasks and metrics, our models.

lm-eval asks and judges in a child of its own (`harness_child`); token ids, the same for all formats, cross to the measuring
children (`run`), which need no lm-eval, and their answers come back.
"""
