"""The shop's tables."""

from datetime import UTC, datetime

from sqlalchemy import CheckConstraint, DateTime, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


def now() -> datetime:
    return datetime.now(UTC)


class Base(DeclarativeBase):
    pass


class Product(Base):
    __tablename__ = "products"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    cents: Mapped[int]


class Stock(Base):
    """How much of a product is where."""

    __tablename__ = "stock"
    __table_args__ = (CheckConstraint("available >= 0 AND reserved >= 0"),)

    product_id: Mapped[str] = mapped_column(ForeignKey("products.id"), primary_key=True)
    available: Mapped[int] = mapped_column(default=0)
    reserved: Mapped[int] = mapped_column(default=0)
    sold: Mapped[int] = mapped_column(default=0)


class StockChange(Base):
    """Accounting wants to see every change."""

    __tablename__ = "stock_changes"

    id: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[str] = mapped_column(ForeignKey("products.id"), index=True)
    what: Mapped[str]
    reference: Mapped[str]
    quantity: Mapped[int]


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]  # placed, paid, cancelled, expired
    placed_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=now)
    items: Mapped[list["OrderItem"]] = relationship(lazy="selectin", order_by="OrderItem.product_id")


class OrderItem(Base):
    __tablename__ = "order_items"

    order_id: Mapped[str] = mapped_column(ForeignKey("orders.id"), primary_key=True)
    product_id: Mapped[str] = mapped_column(ForeignKey("products.id"), primary_key=True)
    quantity: Mapped[int]
    returned: Mapped[int] = mapped_column(default=0)


class Paper(Base):
    """What came with goods: a delivery note, a return slip, a till receipt."""

    __tablename__ = "papers"

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]  # delivery, return, sale
