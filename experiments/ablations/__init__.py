"""The paper's ablations at nano size: rows as data, trained, scored and compared by one command."""
