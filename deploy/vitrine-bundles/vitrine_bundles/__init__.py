"""The model bundles that ship with Vitrine."""
