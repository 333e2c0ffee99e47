"""The paper's ablations at nano size: rows as data, trained and scored by one command, compared with
intervals."""
