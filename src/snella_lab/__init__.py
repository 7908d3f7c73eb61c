"""Method comparison, reproduction of the paper and analysis of trained runs; a plugin of snella_app."""
