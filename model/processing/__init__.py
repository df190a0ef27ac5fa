"""Text and pictures to token ids and tiles, and token ids back to text. Torch-free."""

from .chat import ChatTemplate
from .images import ImageProcessor, TiledImage, load_image
from .prompt import PreparedPrompt, PromptProcessor
from .tokenizer import StreamDecoder, Tokenizer, load_tokenizer

__all__ = [
    "ChatTemplate", "ImageProcessor", "PreparedPrompt", "PromptProcessor", "StreamDecoder", "TiledImage", "Tokenizer",
    "load_image", "load_tokenizer",
]
