"""Studies behind the project: each folder asks one question. They are not part of the wheel."""
