"""On-policy distillation and task RL on TRL: trainers, configs, losses, health metrics, resume."""
