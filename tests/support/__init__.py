"""What tests share: tiny models, graphs, plans, and programs that run as processes of their own."""
