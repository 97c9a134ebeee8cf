"""Tasks for lm-eval; their functions make our model known to its stock command."""
