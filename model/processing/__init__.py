"""Text and pictures to token ids and tiles, and token ids back to text. Torch-free."""

from .chat import ChatTemplate
from .check import check_processor
from .generation_defaults import GenerationDefaults
from .images import ImageProcessor, TiledImage
from .pictures import load_image
from .prompt import PreparedPrompt, Prompt, PromptProcessor, whole_numbers
from .tokenizer import StreamDecoder, Tokenizer, load_tokenizer

__all__ = [
    "ChatTemplate", "GenerationDefaults", "ImageProcessor", "PreparedPrompt", "Prompt", "PromptProcessor",
    "StreamDecoder", "TiledImage", "Tokenizer", "check_processor", "load_image", "load_tokenizer", "whole_numbers",
]
