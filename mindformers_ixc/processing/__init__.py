"""Text, images and videos to the arrays of a sample: host code that needs neither MindSpore nor MindFormers."""
