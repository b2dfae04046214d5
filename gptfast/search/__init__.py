"""Train with several settings and compare the runs."""
