"""Which server a model starts on, and which instances make room."""
