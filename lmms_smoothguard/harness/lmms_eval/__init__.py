"""Inside lmms-eval: its own wrappers with a defence around them, its own task finder with our tasks in it."""
