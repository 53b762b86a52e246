for (const document_ of document.querySelectorAll("script[type='application/json']")) {
  const figure = document.getElementById(document_.dataset.figure);
  vegaEmbed(figure, JSON.parse(document_.textContent), {
    renderer: "svg",
    actions: { export: true, source: false, compiled: false, editor: false },
  }).catch((error) => {
    figure.textContent = `This chart cannot be drawn: ${error}`;
  });
}
