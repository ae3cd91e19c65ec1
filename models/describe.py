"""The command `python -m crescendo.models.describe PRESET`: `crescendo.experiments.describe`."""

if __name__ == "__main__":
    import runpy

    runpy.run_module("crescendo.experiments.describe", run_name="__main__")
