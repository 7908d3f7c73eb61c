"""Method comparison, reproduction of the paper and analysis of trained runs, as a plugin of snella_app."""
