"""Several trainings, for the settings that do best."""
