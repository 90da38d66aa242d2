"""`rm-recipe check RECIPE --data`: what is wrong with the data, before anything is trained."""

from rm_recipe.artifacts import write_json
from rm_recipe.datasets import refuse_leakage
from rm_recipe.recipe import Recipe, is_run_folder
from rm_recipe.recipe_keys import DEVICE_KEYS
from rm_recipe.train import DATA_REPORT, changed_keys, check_run_folder, load_data, report_data


def check_data(recipe: Recipe) -> None:
    """Prints the doctor's report and writes it under `output_dir`.

    The report of another recipe's run is left alone.

    Raises:
        RecipeError, DataError: whatever would stop training, leakage among it; the report is
            written all the same where there is one.
    """
    folder = recipe.output_dir
    used = is_run_folder(folder)
    check_run_folder(recipe, resume=False, overwrite=used)
    _, train_split, test_split, leakage = load_data(recipe)
    report = report_data(recipe, train_split, test_split, leakage)
    changed = [key for key in changed_keys(recipe, folder) if key not in DEVICE_KEYS] if used else []
    if changed:
        print(
            f"report: not written; {folder} holds a run of another recipe ({', '.join(changed)} differ) "
            "and its report. --output_dir takes another folder."
        )
    else:
        write_json(folder / DATA_REPORT, report)
        print(f"report: {folder / DATA_REPORT}")
    refuse_leakage(recipe, leakage)
