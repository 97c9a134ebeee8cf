"""SmoothGuard before a model that only takes requests and gives texts: an engine, a server, a hosted API."""
