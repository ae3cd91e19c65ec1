"""Another name of the command `crescendo describe`, which needs more than meshes."""

if __name__ == "__main__":
    import runpy

    runpy.run_module("crescendo.experiments.describe", run_name="__main__")
