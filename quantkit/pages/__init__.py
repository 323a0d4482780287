"""Pages that people read: pictures as inline SVG, and the frame around them, light and dark, wide and narrow."""
