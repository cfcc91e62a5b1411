"""SceneVLM, the small trained model that the package ships, and the cache it is assembled in."""

from corematching.demo.assemble import assemble
from corematching.demo.assets import SceneAssets, write_assets
from corematching.demo.cache import demo_directory, load_demo
from corematching.demo.language import LanguageSource, find_language_model

__all__ = [
    "LanguageSource",
    "SceneAssets",
    "assemble",
    "demo_directory",
    "find_language_model",
    "load_demo",
    "write_assets",
]
