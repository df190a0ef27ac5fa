"""Lowerings of ``RoutedExperts``."""
