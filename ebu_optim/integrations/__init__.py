"""What fits the optimizer into other people's trainers. Each file needs the package it names."""
