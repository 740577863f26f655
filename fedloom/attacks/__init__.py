"""What an attacker learns from a model: attacks run as measurements, each beside what chance would give."""
