"""Why does my robot fail? `spear diagnose`: data, policy and rollout, looked at together."""
