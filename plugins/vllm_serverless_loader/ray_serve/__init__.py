"""ServerlessLLM on a Ray cluster: placement by start-up time, routing, migration."""
