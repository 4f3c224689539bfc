// A place in JupyterLab: photos are dropped, pasted or taken. Each goes to Python as one message, its bytes as they are.

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function render({ model, el }) {
  const words = model.get("words");
  const told = element("span", { role: "status" });
  const video = element("video", { autoplay: true, muted: true, playsInline: true, ariaLabel: words.camera });
  const take = element("button", { type: "button", className: "jupyter-button", textContent: words.camera });
  const shoot = element("button", { type: "button", className: "jupyter-button", textContent: words.shoot });
  const close = element("button", { type: "button", className: "jupyter-button", textContent: words.close });
  const camera = element("div", { hidden: true }, video, element("div", {}, shoot, close));
  const place = element("div", { className: "ps-drop", tabIndex: 0, role: "group", ariaLabel: words.drop },
    element("span", { textContent: words.drop }), " ", take, " ", told, camera);
  place.dataset.lmSuppressShortcuts = "true"; // Ctrl+V pastes here, not into the notebook
  take.hidden = !navigator.mediaDevices; // browsers offer no camera to pages without https
  el.append(place);

  async function send(files) {
    const fits = files.filter((file) => file.size <= model.get("most_bytes"));
    told.textContent = files.filter((file) => !fits.includes(file)).map((file) => `${file.name}: ${words.too_large}`)
      .join(" ");
    const drop = `${Date.now()} ${Math.random()}`; // photos of two drops may arrive in turn
    for (const [k, file] of fits.entries()) {
      const content = await file.arrayBuffer();
      model.send({ drop, name: file.name, number: k + 1, of: fits.length }, undefined, [content]);
    }
  }

  // --- drop and paste ---

  const over = (on) => (event) => {
    event.preventDefault();
    event.stopPropagation();
    place.classList.toggle("over", on);
  };
  place.addEventListener("dragover", over(true));
  place.addEventListener("dragleave", over(false));
  place.addEventListener("drop", (event) => {
    over(false)(event);
    send([...event.dataTransfer.files]);
  });
  place.addEventListener("paste", (event) => {
    event.preventDefault();
    event.stopPropagation();
    send([...event.clipboardData.files]);
  });

  // --- camera ---

  let stream = null;

  function stop() {
    for (const track of stream ? stream.getTracks() : []) track.stop();
    stream = null;
    video.srcObject = null;
    camera.hidden = true;
  }

  take.addEventListener("click", async () => {
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1920 },
        height: { ideal: 1920 } } });
    } catch {
      told.textContent = words.no_camera;
      return;
    }
    told.textContent = "";
    video.srcObject = stream;
    camera.hidden = false;
  });
  shoot.addEventListener("click", async () => {
    if (!video.videoWidth) return;
    const canvas = element("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    stop();
    const time = new Date().toTimeString().slice(0, 8).replaceAll(":", "");
    const blob = await new Promise((done) => { canvas.toBlob(done, "image/jpeg", 0.95); });
    send([new File([blob], `camera_${time}.jpg`)]);
  });
  close.addEventListener("click", stop);
  return stop;
}

export default { render };
