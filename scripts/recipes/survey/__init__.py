"""Which models `condition` handles: tiny models of every type, and tracing of their attention."""
