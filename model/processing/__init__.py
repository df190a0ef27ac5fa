"""Text, pictures and videos to token ids and tiles, and token ids back to text. Torch-free."""

from .chat import ChatTemplate
from .check import check_processor
from .films import can_read_films
from .frames import Frame, FrameSampling
from .generation_defaults import GenerationDefaults
from .images import ImageProcessor, TiledImage
from .pictures import load_image
from .prompt import PreparedPrompt, Prompt, PromptProcessor, whole_numbers
from .tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from .video import load_video

__all__ = [
    "ChatTemplate", "Frame", "FrameSampling", "GenerationDefaults", "ImageProcessor", "PreparedPrompt", "Prompt",
    "PromptProcessor", "StreamDecoder", "TiledImage", "Tokenizer", "can_read_films", "check_processor", "load_image",
    "load_tokenizer", "load_video", "whole_numbers",
]
