"""What the shop refuses."""


class ShopError(Exception):
    status = 409


class OrderNotFound(ShopError):
    status = 404


class OutOfStock(ShopError):
    """There is not enough; nothing was taken."""


class OrderClosed(ShopError):
    """The order can't change like this any more."""


class ReturnRefused(ShopError):
    """More came back than was sold."""
