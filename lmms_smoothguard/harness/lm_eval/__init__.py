"""lm-eval: its Hugging Face model for images with a defence, and attacks, around it; and tasks that ask for attacks."""
