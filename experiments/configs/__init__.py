"""What configs can name, how they are read, and the configs that ship."""
