"""The control plane: API, gateway, stores, reconciler, CLI and SDK. No torch in this process."""
