"""fedloom: federated instruction tuning of large language models.

Start reading at `fedloom/federation.py`, the round loop; start using at `fedloom.experiment.commands`.
"""
