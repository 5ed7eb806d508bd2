"""Real architectures from tiny configs, one table; ``model_zoo`` puts the families together."""
