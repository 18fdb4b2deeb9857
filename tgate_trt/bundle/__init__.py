"""Bundles: the manifest, the folder, and what they hold."""
