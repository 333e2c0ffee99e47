"""Checks that need the policy itself: one file per fault, as in `spear.checks.rollout`."""
