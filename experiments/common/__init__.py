"""What every experiment shares: command line, data, metrics, training loop, report."""
