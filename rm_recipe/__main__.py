"""`python -m rm_recipe VERB`, the same as `rm-recipe VERB`."""

from rm_recipe.cli import main

if __name__ == "__main__":
    main()
