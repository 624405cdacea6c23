"""The learned networks of CG-FedLLM: settings, image layouts, networks, and the transform."""
