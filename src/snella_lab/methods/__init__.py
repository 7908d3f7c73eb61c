"""Methods that SNELLA is compared with and that are not part of PEFT."""
