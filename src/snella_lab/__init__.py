"""Method comparison, reproduction of the paper and analysis of trained runs; registered as a plugin of snella_app."""
