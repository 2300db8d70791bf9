// An item's request as curl or Python, so that the same picture can be had without the page. The key is never copied.

import { hasKey } from "./api.js";

const server = () => new URL(".", document.baseURI).href.replace(/\/$/, "");

/** A word for a POSIX shell: within single quotes nothing is special but the quote itself. */
function shellWord(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** JSON's literals for texts and numbers are Python's, too. */
function pythonWord(value) {
  return JSON.stringify(value);
}

export function asCurl({ media, request }) {
  const key = hasKey() ? ` -H "Authorization: Bearer $RMD_API_KEY"` : "";
  const body = shellWord(JSON.stringify(request));
  const json = "-H 'Content-Type: application/json'";
  const post = (path) => `curl -s ${shellWord(`${server()}${path}`)} ${json}${key} \\\n  -d ${body}`;
  if (media !== "video") {
    const save = [
      "import base64, json, sys",
      'open("picture.png", "wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))',
    ].join("; ");
    return `${post("/v1/images/generations")} \\\n  | python3 -c ${shellWord(save)}\n`;
  }
  const job = `${shellWord(`${server()}/v1/videos/`)}"$ID`;
  return [
    `ID=$(${post("/v1/videos")} \\\n  | python3 -c 'import json, sys; print(json.load(sys.stdin)["id"])')`,
    `while curl -s${key} ${job}" | grep -Eq '"status": ?"(queued|in_progress)"'; do sleep 2; done`,
    `curl -sf${key} -o film.mp4 ${job}/content"`,
    "",
  ].join("\n");
}

export function asPython({ media, request }) {
  const { prompt, model, ...extra } = request;
  const more = Object.entries(extra).map(([name, value]) => `${pythonWord(name)}: ${pythonWord(value)}`).join(", ");
  const key = hasKey() ? 'os.environ["RMD_API_KEY"]' : '"none"';
  const asked = `prompt=${pythonWord(prompt)}, model=${pythonWord(model)}, extra_body={${more}}`;
  const film = [
    `video = client.videos.create_and_poll(${asked})`,
    'client.videos.download_content(video.id).write_to_file("film.mp4")',
  ];
  const picture = [
    `reply = client.images.generate(${asked})`,
    'open("picture.png", "wb").write(base64.b64decode(reply.data[0].b64_json))',
  ];
  return [
    ...(media === "video" ? [] : ["import base64"]),
    ...(hasKey() ? ["import os"] : []),
    ...(media === "video" && !hasKey() ? [] : [""]),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${pythonWord(`${server()}/v1`)}, api_key=${key})`,
    ...(media === "video" ? film : picture),
    "",
  ].join("\n");
}

/** Puts text on the clipboard; pages that did not come over HTTPS or from this machine have the old way only. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (!copied) throw new Error("This browser does not let a page copy.");
}
