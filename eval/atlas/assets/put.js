"use strict";
// What the page shows: `meta` stands in the page, arrays arrive by `put`, from here or other files.
const ATLAS = { meta: {}, blobs: {}, put(name, value) { this.blobs[name] = value; } };
