"use strict";
const main = document.getElementById("cards");
const cards = [...main.children];
const [status, label, sort] = ["status", "label", "sort"].map((id) => document.getElementById(id));
const rmsd = (card) => (card.dataset.rmsd === "" ? Infinity : Number(card.dataset.rmsd));
const orders = {
  order: (a, b) => a.dataset.number - b.dataset.number,
  rising: (a, b) => rmsd(a) - rmsd(b) || orders.order(a, b),
  falling: (a, b) => (rmsd(b) === Infinity ? -1 : rmsd(b)) - (rmsd(a) === Infinity ? -1 : rmsd(a)) || orders.order(a, b),
};
function update() {
  let shown = 0;
  for (const card of cards) {
    const fits = (!status.value || card.dataset.status === status.value)
      && (!label.value || card.dataset.labels.split(" ").includes(label.value));
    card.hidden = !fits;
    shown += fits;
  }
  document.getElementById("count").textContent = `${shown} shown`;
  document.getElementById("none").hidden = shown > 0;
}
function rearrange() {
  cards.sort((a, b) => {
    const order = orders[sort.value](a, b);
    return Number.isNaN(order) ? orders.order(a, b) : order;
  });
  main.append(...cards);
}
for (const choice of [status, label]) choice.addEventListener("change", update);
sort.addEventListener("change", rearrange);
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
main.addEventListener("input", (event) => {
  if (event.target.matches(".slider")) event.target.parentElement.style.setProperty("--cut", `${event.target.value}%`);
});
update();
