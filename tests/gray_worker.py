"""``inventory-sdk`` as a module, for tests that start it with their own interpreter."""

from inventory_sdk.cli import main

if __name__ == "__main__":
    main()
