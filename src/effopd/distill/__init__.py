"""Train: OPDConfig, OPDTrainer (on TRL's DistillationTrainer), losses, health metrics, the cost
ledger.
"""
