{{- /* KubeRay gives its pods the name of its own; these two are ours: {root, server}. */ -}}
{{- define "rmd.rayLabels" -}}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .server.name }}
{{- end }}

{{- /* deploy/ray/rmd.yaml with these settings: {root, server, hardware}. Ray's tasks run in folders of Ray's, so paths are whole. */ -}}
{{- define "rmd.rayApplication" -}}
{{- $checkpoints := list }}
{{- range .server.checkpoints }}{{ $checkpoints = append $checkpoints (ternary . (printf "/app/%s" .) (hasPrefix "/" .)) }}{{ end }}
{{- $arguments := mergeOverwrite (omit (include "rmd.settings" . | fromJson) "build_missing" "host" "port") (dict "checkpoint" $checkpoints) }}
{{- range $name, $value := dict "fronts" .server.ray.fronts "min_engines" .server.ray.minEngines "max_engines" .server.ray.maxEngines "engine_seconds" .server.ray.secondsPerEngine }}
{{- $_ := set $arguments $name $value }}
{{- end }}
proxy_location: EveryNode
http_options: {host: 0.0.0.0, port: 8000, keep_alive_timeout_s: 75}
applications:
  - name: rmd
    route_prefix: /
    import_path: deploy.ray.app:build
    args: {{- toYaml $arguments | nindent 6 }}
{{- end }}

{{- /* One node of a Ray cluster: {root, server, hardware}; of the head also head, and scaled where it asks for workers. */ -}}
{{- define "rmd.rayPod" -}}
metadata:
  labels: {{- include "rmd.rayLabels" . | nindent 4 }}
spec:
  {{- include "rmd.pod" (merge (dict "asksKubernetes" .scaled) .) | nindent 2 }}
  {{- if not .head }}
  terminationGracePeriodSeconds: {{ include "rmd.graceSeconds" . }}
  {{- end }}
  containers:
    - name: {{ ternary "head" "worker" (default false .head) }}
      image: {{ include "rmd.image" .root }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      env:
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        {{- include "rmd.secretEnvironment" . | trim | nindent 8 }}
      {{- with .root.Values.objects.secret }}
      envFrom:
        - secretRef: {name: {{ . }}}
      {{- end }}
      ports:
        {{- if .head }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        {{- end }}
        - {name: serve, containerPort: 8000}
      # Said here, since KubeRay's own call wget, which the image has not.
      livenessProbe:
        httpGet: {path: /api/local_raylet_healthz, port: 52365}
        initialDelaySeconds: 30
        timeoutSeconds: 5
        failureThreshold: 24
      readinessProbe:
        httpGet: {{ if .head }}{path: /api/gcs_healthz, port: 8265}{{ else }}{path: /-/healthz, port: 8000}{{ end }}
        initialDelaySeconds: 10
        timeoutSeconds: 5
      resources: {{- include "rmd.resources" . | nindent 8 }}
      securityContext: {{- include "rmd.containerSecurity" . | nindent 8 }}
      volumeMounts:
        {{- if .hardware.engines }}
        - {name: engines, mountPath: /engines{{ if .hardware.engines.build }}, readOnly: true{{ end }}}
        {{- end }}
        - {name: films, mountPath: /films}
        {{- include "rmd.mounts" . | nindent 8 }}
  volumes:
    {{- if .hardware.engines }}
    - name: engines
      {{- include "rmd.enginesVolume" . | nindent 6 }}
    {{- end }}
    - name: films
      {{- toYaml (default (dict "emptyDir" dict) .server.films) | nindent 6 }}
    {{- include "rmd.volumes" . | nindent 4 }}
{{- end }}
