"""`smoothguard proxy`: an OpenAI-compatible reverse proxy that defends whatever engine stands behind it."""
